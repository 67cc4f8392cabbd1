"""Communication between ranks: rendezvous, collectives, and detection of lost ranks."""

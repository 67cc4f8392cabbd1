"""Data sets: found, downloaded, checked and read into memory."""

"""The host and the installation: CPU quota, hardware, package versions, shipped files. Imports no torch."""

"""This machine and this installation: CPU quota, hardware, package versions, shipped files. Imports no torch."""

"""Primary/backup fault tolerance for QEMU virtual machines."""

__version__ = "0.1.0.dev0"

"""Data sets, one folder or file each, and the downloader."""

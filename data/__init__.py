"""Data sets, one folder each, and the downloader."""

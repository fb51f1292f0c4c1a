"""One file per dataset, and the one downloader."""

"""What `imitate-ds doctor` looks at: the software, this machine, its storage, and the lines between ranks."""

"""What an operator may ask of the running daemon, on loopback."""

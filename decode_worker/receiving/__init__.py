"""What the receiver writes into, and with which grant."""

"""What travels between the driver and its workers. Needs no torch."""

"""The batch on the hardware there is: devices, ranks, wrappers."""

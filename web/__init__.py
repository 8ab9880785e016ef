"""What faces HTTP: errors, the decoding of bodies and parameters; knows nothing of queues, policies or torch."""

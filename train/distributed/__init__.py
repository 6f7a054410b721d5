"""Training with many processes: collectives, heartbeat, launch, sharding."""

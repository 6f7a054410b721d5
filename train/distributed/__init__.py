"""Many processes as one: collectives, heartbeat, launch, sharding."""

"""What commands do beyond one function of the library: demo, replay, dry run, doctor."""

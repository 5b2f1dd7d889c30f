"""The ways to run on one machine: federated in this process or through Flower's simulation, and centralised."""

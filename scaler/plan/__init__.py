"""What a recipe takes on a machine, before anything is started there: memory, network, time, and the best strategy."""

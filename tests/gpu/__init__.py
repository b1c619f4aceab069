"""What only a GPU can show; `make test-gpu`. The parts that need none are tested everywhere."""

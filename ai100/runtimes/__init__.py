"""What slots run on: the card, or a host with the same contract."""

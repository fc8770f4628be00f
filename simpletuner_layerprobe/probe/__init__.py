"""A model under the probe: blocks and streams found, hidden states in, angular distances out. No SimpleTuner."""

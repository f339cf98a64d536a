"""What runs a compiled step: its values, sweeps over chunks of tokens, and the five stages."""

"""What the commands do: both stages, alone and together, with what they leave."""

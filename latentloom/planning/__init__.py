"""What a run will take, before it begins: recipes, steps, memory."""

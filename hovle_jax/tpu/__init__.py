"""TPUs that are not here: chips as data, and compiled steps read for what they would cost."""

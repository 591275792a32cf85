"""The suite tests itself: cases, inputs, budget, checkers."""

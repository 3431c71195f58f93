"""Pure builders of everything that the operator asks for."""

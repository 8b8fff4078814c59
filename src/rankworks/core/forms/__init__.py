"""The forms a change can take: what a method of parametrisation subclasses, by the factors or entries it has."""

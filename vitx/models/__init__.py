"""Models, whatever their attention: how they are loaded and run, with their classes and outputs."""

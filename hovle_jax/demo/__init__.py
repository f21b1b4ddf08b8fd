"""The digit demonstration: every stage of HoVLE on real handwriting, offline, on a CPU."""

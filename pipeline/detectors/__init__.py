"""The student: detectors behind one interface."""

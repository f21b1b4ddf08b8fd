"""Files on disk -> records -> examples -> packed rows -> batches."""

"""Hardware blocks, one idea per file; the top (`skipopu.hw.top`) is assembled from these."""

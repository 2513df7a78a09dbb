"""Where cycles and bytes go: prediction without hardware, analysis of what a device recorded, pictures."""

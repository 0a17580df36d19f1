"""Speed and memory, measured against what users have today. One benchmark at a time, alone on the machine."""

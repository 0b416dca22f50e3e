"""What is read and written: pictures, saved inversions, JSON and safetensors headers at the door."""

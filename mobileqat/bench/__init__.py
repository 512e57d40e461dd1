"""Latency of `.tflite` files: on this host, on emulated ARM, on Android devices."""

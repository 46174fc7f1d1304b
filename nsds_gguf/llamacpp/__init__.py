"""llama.cpp and ggml: the only package that knows ctypes; llama.cpp runs in a process of its own."""

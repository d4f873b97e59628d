package main

// As a dynamically linked program, which C code makes of it.
import "C"

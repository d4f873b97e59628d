// As a dynamically linked program: that is what a package with C in it is.

package main

import "C"

// Maps a file by Go's own system calls, and writes it out again.
package main

import (
	"crypto/sha256"
	"fmt"
	"os"
	"sync"
	"syscall"
)

func main() {
	file, err := os.Open(os.Args[1])
	if err != nil {
		panic(err)
	}
	info, _ := file.Stat()
	data, err := syscall.Mmap(int(file.Fd()), 0, int(info.Size()), syscall.PROT_READ, syscall.MAP_SHARED)
	if err != nil {
		panic(err)
	}
	var wait sync.WaitGroup
	sums := make([][32]byte, 8)
	for i := range sums {
		wait.Add(1)
		go func(i int) {
			defer wait.Done()
			part := len(data) / len(sums)
			sums[i] = sha256.Sum256(data[i*part : (i+1)*part])
		}(i)
	}
	wait.Wait()
	out, err := os.Create(os.Args[2])
	if err != nil {
		panic(err)
	}
	n, err := out.Write(data)
	fmt.Println(sums, n, err)
}

package process

import (
	"sync"
	"testing"
)

// TestSupportedAgain: to ask while the one that is asked for is being released is
// no failure.
func TestSupportedAgain(t *testing.T) {
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 2000 {
				if err := Supported(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

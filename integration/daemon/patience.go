package daemon

import (
	"os"
	"strconv"
	"time"
)

// Patience stretches a time limit where the machine is slow, as an emulated one
// is: as many times as GANTRY_PATIENCE says.
func Patience(limit time.Duration) time.Duration {
	if n, err := strconv.Atoi(os.Getenv("GANTRY_PATIENCE")); err == nil && n > 1 {
		return time.Duration(n) * limit
	}
	return limit
}

package daemon

import (
	"os"
	"strconv"
	"time"
)

// Patience is a limit of the tests for the machine that they run on, and for what they
// expect of the daemon: as many times as GANTRY_PATIENCE says, a part where that is less
// than one.
func Patience(limit time.Duration) time.Duration {
	if n, err := strconv.ParseFloat(os.Getenv("GANTRY_PATIENCE"), 64); err == nil && n > 0 {
		return time.Duration(n * float64(limit))
	}
	return limit
}

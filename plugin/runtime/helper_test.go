package runtime_test

import "time"

// shortly is longer than a shim takes to answer and short for a test.
const shortly = 500 * time.Millisecond

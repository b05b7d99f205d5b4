package crilog

import (
	"bytes"
	"time"
)

// stampFormat is RFC 3339 with all nine digits, so that records line up.
const stampFormat = "2006-01-02T15:04:05.000000000Z07:00"

// formatter turns raw output into records. Its zero value has no limits set
// and must not be used.
type formatter struct {
	full, partial []byte // what precedes the bytes of a record
	maxLine       int
	limit         int // no record is begun that would make out longer, save the first
	out           []byte
}

// stamp sets the time and stream of the records to come.
func (f *formatter) stamp(now time.Time, s Stream) {
	f.full = now.UTC().AppendFormat(f.full[:0], stampFormat)
	f.full = append(append(append(f.full, ' '), s.String()...), ' ')
	f.partial = append(append(f.partial[:0], f.full...), "P "...)
	f.full = append(f.full, "F "...)
}

// format appends the records of in to out and returns how many bytes of in
// they hold. Bytes that may be the start of a longer line are left, unless
// last says that nothing follows them: then they become a record tagged P,
// because a reader adds nothing to such a record and so gets the very bytes.
func (f *formatter) format(in []byte, last bool) int {
	done := 0
	for len(in) > 0 {
		head, n := f.full, bytes.IndexByte(in[:min(len(in), f.maxLine+1)], '\n')
		size := n + 1
		if n < 0 {
			if len(in) <= f.maxLine && !last {
				return done
			}
			head, n = f.partial, min(len(in), f.maxLine)
			size = n
		}
		if len(f.out) > 0 && len(f.out)+len(head)+n+1 > f.limit {
			return done
		}
		f.out = append(append(append(f.out, head...), in[:n]...), '\n')
		in = in[size:]
		done += size
	}
	return done
}

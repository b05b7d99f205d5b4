package config

import (
	"crypto/tls"
	"slices"
	"strconv"
	"time"
)

// Server is the configuration of the CRI server.
type Server struct {
	// DisableTCPService keeps the CRI off containerd's TCP address.
	DisableTCPService bool
	// StreamAddress is where streams are served, "" for the node's address.
	StreamAddress string
	// StreamPort is 0 for any free port.
	StreamPort uint16
	// StreamIdleTimeout closes a stream without traffic; 0 is no limit.
	StreamIdleTimeout time.Duration
	StreamTLS         StreamTLS
}

// StreamTLS says whether and with what streams are encrypted. If Enabled and
// the files are empty, the server makes a self-signed certificate; it is never
// one file without the other.
type StreamTLS struct {
	Enabled           bool
	CertFile, KeyFile string
	// ClientCAFile has who vouches for clients, "" for any client.
	ClientCAFile string
	// MinVersion and CipherSuites have the numbers of package crypto/tls. No
	// suites leave the choice to that.
	MinVersion   uint16
	CipherSuites []uint16
}

// ParseServer checks the server table and returns its meaning. The error joins
// a KeyError for everything that is wrong.
func ParseServer(raw Raw) (Server, []Warning, error) {
	w, v := load(ServerPlugin, raw)
	out := Server{
		DisableTCPService: v.bool("disable_tcp_service"),
		StreamAddress:     v.str("stream_server_address"),
		StreamPort:        w.port(v.str("stream_server_port")),
		StreamIdleTimeout: v.duration("stream_idle_timeout", 4*time.Hour),
		StreamTLS:         w.streamTLS(v),
	}
	warnings, err := w.result()
	if err != nil {
		return Server{}, warnings, err
	}
	return out, warnings, nil
}

func (w *walker) port(s string) uint16 {
	port, err := strconv.ParseUint(s, 10, 16)
	if err != nil {
		w.fail([]string{"stream_server_port"}, "%q is not a port, write a number from 0 to 65535 in quotes", s)
	}
	return uint16(port)
}

func (w *walker) streamTLS(v values) StreamTLS {
	const pair = "x509_key_pair_streaming"
	out := StreamTLS{
		Enabled:  v.bool("enable_tls_streaming"),
		CertFile: v.str(pair + ".tls_cert_file"),
		KeyFile:  v.str(pair + ".tls_key_file"),

		ClientCAFile: v.str(streamCA),
		MinVersion:   w.tlsVersion(v.str(streamVersion)),
	}
	out.CipherSuites = w.cipherSuites(v.list(streamSuites), out.MinVersion)
	cert, key := []string{pair, "tls_cert_file"}, []string{pair, "tls_key_file"}
	w.absolute(out.CertFile, cert...)
	w.absolute(out.KeyFile, key...)
	w.absolute(out.ClientCAFile, streamCA)
	switch {
	case !out.Enabled && out.ClientCAFile != "":
		w.fail([]string{streamCA}, "is set, but enable_tls_streaming is not")
	case !out.Enabled && out.CertFile != "":
		w.fail(cert, "is set, but enable_tls_streaming is not")
	case !out.Enabled && out.KeyFile != "":
		w.fail(key, "is set, but enable_tls_streaming is not")
	case out.CertFile != "" && out.KeyFile == "":
		w.fail(key, "is needed with tls_cert_file")
	case out.CertFile == "" && out.KeyFile != "":
		w.fail(cert, "is needed with tls_key_file")
	}
	return out
}

// Our own keys of the server.
const (
	streamCA      = "stream_tls_client_ca"
	streamVersion = "stream_tls_min_version"
	streamSuites  = "stream_tls_cipher_suites"
)

func (w *walker) tlsVersion(s string) uint16 {
	switch s {
	case "1.2":
		return tls.VersionTLS12
	case "1.3":
		return tls.VersionTLS13
	}
	w.fail([]string{streamVersion}, "%q is neither \"1.2\" nor \"1.3\"", s)
	return 0
}

// cipherSuites finds suites of TLS 1.2 by the names that they have in IANA's
// registry.
func (w *walker) cipherSuites(names []string, least uint16) (ids []uint16) {
	if len(names) > 0 && least > tls.VersionTLS12 {
		w.fail([]string{streamSuites}, "suites can be chosen with TLS 1.2 only, and "+streamVersion+" is higher")
		return nil
	}
	for _, name := range names {
		i := slices.IndexFunc(tls.CipherSuites(), func(c *tls.CipherSuite) bool {
			return c.Name == name && slices.Contains(c.SupportedVersions, tls.VersionTLS12)
		})
		if i < 0 {
			w.fail([]string{streamSuites}, "%q is no suite of TLS 1.2 that is safe and known here", name)
			continue
		}
		ids = append(ids, tls.CipherSuites()[i].ID)
	}
	return ids
}

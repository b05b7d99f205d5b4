package stream

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// TLS says how the server proves who it is, and what it asks of clients. Files
// are read anew for the next connection after they changed; while that fails,
// what they said before counts.
type TLS struct {
	// CertFile and KeyFile go together. Without them the server makes a
	// certificate of its own, which lives as long as it.
	CertFile, KeyFile string
	// ClientCAFile has the authorities of which one must vouch for a client.
	// Without it any client may connect.
	ClientCAFile string
	// MinVersion is the oldest version that clients may speak, 1.2 if zero.
	MinVersion uint16
	// CipherSuites are those allowed with TLS 1.2, by default what the library
	// thinks best.
	CipherSuites []uint16
}

// selfSignedLife is longer than any daemon runs.
const selfSignedLife = 10 * 365 * 24 * time.Hour

func (t *TLS) config(host string) (*tls.Config, error) {
	c := &tls.Config{MinVersion: max(t.MinVersion, tls.VersionTLS12), NextProtos: []string{"http/1.1"}}
	if len(t.CipherSuites) > 0 {
		c.CipherSuites = t.CipherSuites
	}
	switch {
	case t.CertFile == "" && t.KeyFile == "":
		cert, err := selfSigned(host)
		if err != nil {
			return nil, err
		}
		c.Certificates = []tls.Certificate{cert}
	case t.CertFile == "" || t.KeyFile == "":
		return nil, fmt.Errorf("certificate and key go together: %w", errdefs.ErrInvalidArgument)
	default:
		pair := &files[tls.Certificate]{names: []string{t.CertFile, t.KeyFile}, load: loadPair}
		if _, err := pair.get(); err != nil {
			return nil, fmt.Errorf("load key pair: %w", err)
		}
		c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return pair.get() }
	}
	if t.ClientCAFile == "" {
		return c, nil
	}
	return t.askClients(c)
}

// askClients returns a configuration that is made anew for each connection, with
// the authorities of that moment.
func (t *TLS) askClients(c *tls.Config) (*tls.Config, error) {
	authorities := &files[x509.CertPool]{names: []string{t.ClientCAFile}, load: loadPool}
	if _, err := authorities.get(); err != nil {
		return nil, fmt.Errorf("load authorities of clients: %w", err)
	}
	c.ClientAuth = tls.RequireAndVerifyClientCert
	// A session from before would vouch for a client longer than its authority.
	c.SessionTicketsDisabled = true
	each := c.Clone()
	c.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		pool, err := authorities.get()
		if err != nil {
			return nil, err
		}
		now := each.Clone()
		now.ClientCAs = pool
		return now, nil
	}
	return c, nil
}

func loadPair(names []string) (*tls.Certificate, error) {
	cert, err := tls.LoadX509KeyPair(names[0], names[1])
	return &cert, err
}

func loadPool(names []string) (*x509.CertPool, error) {
	text, err := os.ReadFile(names[0])
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("%s has no certificate in PEM: %w", names[0], errdefs.ErrInvalidArgument)
	}
	return pool, nil
}

func selfSigned(host string) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return tls.Certificate{}, err
	}
	now := time.Now()
	tmpl := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: host},
		NotBefore:             now.Add(-time.Hour),
		NotAfter:              now.Add(selfSignedLife),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
		IsCA:                  true,
		DNSNames:              []string{"localhost"},
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}
	if name, err := os.Hostname(); err == nil {
		tmpl.DNSNames = append(tmpl.DNSNames, name)
	}
	if ip := net.ParseIP(host); ip != nil {
		tmpl.IPAddresses = append(tmpl.IPAddresses, ip)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// files is a value that is read from files.
type files[T any] struct {
	names []string
	load  func(names []string) (*T, error)

	mu    sync.Mutex
	value *T
	from  []os.FileInfo // what the files were like when it was read
}

// get returns the value. While the files are being replaced, and make no sense
// together, the one from before is used.
func (f *files[T]) get() (*T, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now, err := statAll(f.names)
	if err == nil && slices.EqualFunc(now, f.from, same) {
		return f.value, nil
	}
	var value *T
	if err == nil {
		value, err = f.load(f.names)
	}
	if err == nil {
		f.value, f.from = value, now
		return value, nil
	}
	if f.value == nil {
		return nil, err
	}
	log.L.WithError(err).WithField("component", "stream").Warn("TLS files cannot be read: going on with what they said before")
	return f.value, nil
}

func statAll(names []string) (all []os.FileInfo, err error) {
	for _, name := range names {
		st, err := os.Stat(name)
		if err != nil {
			return nil, err
		}
		all = append(all, st)
	}
	return all, nil
}

func same(a, b os.FileInfo) bool {
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}

"""The library ops of reparameterize: schemas, fakes, and which backends serve them."""

from genai_fast.kernels.common.schema import LibraryOp, wide_dtype


def _fake(mu, logvar, seed, offset, with_kl):
    wide = wide_dtype(mu)
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape[:1] if with_kl else (0,), dtype=wide)


def _fake_backward(grad_z, grad_kl, mu, logvar, seed, offset):
    return mu.new_empty(mu.shape), logvar.new_empty(mu.shape)


LIBRARY = (
    LibraryOp(
        "reparameterize(Tensor mu, Tensor logvar, Tensor seed, SymInt offset, bool with_kl, str backend)"
        " -> (Tensor z, Tensor kl)",
        _fake,
    ),
    LibraryOp(
        "reparameterize_backward(Tensor? grad_z, Tensor? grad_kl, Tensor mu, Tensor logvar, Tensor seed,"
        " SymInt offset, str backend) -> (Tensor grad_mu, Tensor grad_logvar)",
        _fake_backward,
    ),
)

"""The library ops of vae_loss: schemas, fakes, and which backends serve them."""

from genai_fast.kernels.common.schema import LibraryOp, wide_dtype


def _fake(recon, target, mu, logvar, beta_tensor, beta, likelihood, reduction):
    wide = wide_dtype(recon)
    shape = recon.shape[:1] if reduction == "none" else ()
    return tuple(recon.new_empty(shape, dtype=wide) for _ in range(3))


def _fake_backward(grad_loss, grad_reconstruction, grad_kl, recon, target, mu, logvar, *settings):
    return tuple(x.new_empty(x.shape) for x in (recon, mu, logvar))


LIBRARY = (
    LibraryOp(
        "vae_loss(Tensor recon, Tensor target, Tensor mu, Tensor logvar, Tensor? beta_tensor, float beta,"
        " str likelihood, str reduction, str backend) -> (Tensor loss, Tensor reconstruction, Tensor kl)",
        _fake,
    ),
    LibraryOp(
        "vae_loss_backward(Tensor? grad_loss, Tensor? grad_reconstruction, Tensor? grad_kl, Tensor recon,"
        " Tensor target, Tensor mu, Tensor logvar, Tensor? beta_tensor, float beta, str likelihood,"
        " str reduction, str backend) -> (Tensor grad_recon, Tensor grad_mu, Tensor grad_logvar)",
        _fake_backward,
    ),
)

"""Networks that listen to speech, and the speech: sentences that espeak-ng says in many voices.

    apt-get install espeak-ng
    pip install --no-deps resemblyzer silero-vad torchaudio

- resemblyzer (three LSTM layers of 256 and a projection, 40 mel bands, 1.6 s): from a voice to an embedding of the speaker. The
  package's three-layer ``nn.LSTM`` is written as three layers of one, with its weights, so that each has hidden units of its own;
  the package's class gives the same (``python benchmarks/_pretrained_speech.py`` shows it). Its spectrogram is librosa's, which
  torchaudio computes here; its removal of silence is left out, since no voice here is silent for long. Score: of pairs of
  utterances, one minus the equal error rate of telling by the cosine whether one speaker said both. Speakers are espeak-ng's
  variants of a voice; those that calibrate, choose and test are different ones, with different sentences.
- silero-vad (a Fourier transform as a convolution, four convolutions and an LSTM of 128; 16 kHz): whether each 32 ms are speech.
  The package ships a TorchScript archive, and a class of another framework. That class is written for PyTorch here, with the
  weights of the archive and the frames of a clip as one sequence; the archive gives the same. (Its safetensors file has somewhat
  other weights.) Speech of 0 to 20 dB above noise (white, brown, or a hum with clicks), with pauses. Score: the fraction of
  frames told right at the package's threshold.
"""

from __future__ import annotations

import functools
import subprocess
import types
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _pretrained_network import Network, Scores, folder_of, own_module, sentences
from scipy.signal import resample_poly
from torch import Tensor, nn

__all__ = ["resemblyzer", "silero"]

RATE = 16_000  # samples a second
EACH = 6  # utterances of a speaker
SPEAKERS = (24, 16, 24)  # that calibrate, choose, test
FRAME, CONTEXT, FRAMES = 512, 64, 125  # samples of a frame and of what comes before it; frames of a clip
THRESHOLD = 0.5  # of silero's probabilities
QUIET = 0.01  # of the mean square of an utterance: frames below are no speech

# -- speech ------------------------------------------------------------------------------------------------------------


@functools.lru_cache
def _spoken(quick: bool) -> tuple[list[list[np.ndarray]], ...]:
    """Utterances by speaker, for those that calibrate, choose and test."""
    variants = _variants()
    counts = (4, 4, 4) if quick else SPEAKERS
    texts = sentences(*(count * EACH for count in counts))
    found = []
    for part, (count, own) in enumerate(zip(counts, texts)):
        speakers = variants[part::3][:count]
        found.append([[_say(v, t, 30 + 7 * (k % 9)) for t in own[k * EACH : (k + 1) * EACH]] for k, v in enumerate(speakers)])
    return tuple(found)


def _variants() -> list[str]:
    """espeak-ng's variants, in a fixed order; without those that whisper."""
    try:
        listed = subprocess.run(["espeak-ng", "--voices=variant"], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise SystemExit("espeak-ng is not installed: apt-get install espeak-ng") from None
    names = sorted(line.split("!v/")[1].split()[0] for line in listed.splitlines() if "!v/" in line)
    return [name for name in names if "whisper" not in name]


def _say(variant: str, text: str, pitch: int) -> np.ndarray:
    command = ["espeak-ng", "-v", f"en-us+{variant}", "-p", str(pitch), "--stdout", text]
    wav = subprocess.run(command, capture_output=True, check=True).stdout
    samples = np.frombuffer(wav[44:], dtype="<i2").astype(np.float32) / 2**15  # 22,050 a second
    return resample_poly(samples, 320, 441).astype(np.float32)


# -- resemblyzer -------------------------------------------------------------------------------------------------------


class SpeakerEncoder(nn.Module):
    """``VoiceEncoder`` of the package, its LSTM's layers apart: [batch, 160 frames, 40 bands] to [batch, 256], of length 1."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        whole: nn.LSTM = encoder.lstm
        widths = [whole.input_size, *[whole.hidden_size] * (whole.num_layers - 1)]
        self.layers = nn.ModuleList([nn.LSTM(width, whole.hidden_size, batch_first=True) for width in widths])
        for k, layer in enumerate(self.layers):
            kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            layer.load_state_dict({f"{kind}_l0": getattr(whole, f"{kind}_l{k}") for kind in kinds})
        self.linear = encoder.linear

    def forward(self, mels: Tensor) -> Tensor:
        for layer in self.layers:
            mels, _ = layer(mels)
        raw = F.relu(self.linear(mels[:, -1]))
        return raw / torch.norm(raw, dim=1, keepdim=True)


def _voice_encoder() -> Any:
    """The package's class, from its own file: its ``__init__`` imports librosa and webrtcvad."""
    folder = folder_of("resemblyzer", "pip install --no-deps resemblyzer")
    settings = own_module(folder / "hparams.py", "_resemblyzer_settings", {})
    package = types.ModuleType("resemblyzer")
    package.audio = None  # type: ignore[attr-defined]
    module: Any = own_module(
        folder / "voice_encoder.py", "_resemblyzer_model", {"resemblyzer": package, "resemblyzer.hparams": settings}
    )
    return module.VoiceEncoder("cpu", verbose=False, weights_fpath=folder / "pretrained.pt").eval()


def resemblyzer(quick: bool) -> Network:
    encoder = _voice_encoder()
    model = SpeakerEncoder(encoder).eval()
    parts = [_partials(encoder, speakers) for speakers in _spoken(quick)]
    reference = [_embedded(model, part) for part in parts]

    def verification(module: nn.Module, part: int) -> Scores:
        found = _embedded(module, parts[part])
        speakers = torch.arange(len(found)) // EACH
        upper = torch.triu_indices(len(found), len(found), 1)
        alike = (found @ found.T)[upper[0], upper[1]]
        same = speakers[upper[0]] == speakers[upper[1]]
        cosine = float((found * reference[part]).sum(1).mean())
        return {"verification": 1 - _equal_error(alike, same), "cosine to the unpruned": cosine}

    batches = [(x,) for x in parts[0][0].split(32)]
    example = (parts[0][0][:1],)
    return Network(model, example, batches, lambda m: verification(m, 1), lambda m: verification(m, 2), [model.linear])


def _partials(encoder: Any, speakers: Sequence[Sequence[np.ndarray]]) -> tuple[Tensor, Tensor]:
    """Windows [windows, 160, 40] of all utterances, as ``embed_utterance`` cuts them, and the utterance of each."""
    from torchaudio.transforms import MelSpectrogram

    to_mel = MelSpectrogram(RATE, n_fft=400, hop_length=160, n_mels=40, norm="slaney", mel_scale="slaney", pad_mode="constant")
    windows, owners = [], []
    for number, wav in enumerate(wav for utterances in speakers for wav in utterances):
        level = 10 ** (-30 / 20) / max(float(np.sqrt(np.mean(wav**2))), 1e-9)  # the package raises to -30 dB, and never lowers
        cuts, slices = encoder.compute_partial_slices(len(wav), 1.3, 0.75)
        padded = np.pad(wav * max(level, 1.0), (0, max(0, cuts[-1].stop - len(wav))))
        mel = to_mel(torch.from_numpy(padded).float()).T
        windows += [mel[each] for each in slices]
        owners += [number] * len(slices)
    return torch.stack(windows), torch.tensor(owners)


@torch.no_grad()
def _embedded(module: nn.Module, part: tuple[Tensor, Tensor]) -> Tensor:
    """[utterances, 256]: the mean of the windows' embeddings, of length 1."""
    module.eval()
    windows, owners = part
    each = torch.cat([module(x) for x in windows.split(64)])
    total = torch.zeros(int(owners.max()) + 1, each.shape[1]).index_add_(0, owners, each)
    return F.normalize(total, dim=1)


def _equal_error(alike: Tensor, same: Tensor) -> float:
    """The rate at which as many pairs of one speaker are rejected as of two are accepted."""
    order = alike.argsort(descending=True)
    hits = same[order].double()
    accepted = torch.cumsum(1 - hits, 0) / (1 - hits).sum()
    rejected = 1 - torch.cumsum(hits, 0) / hits.sum()
    place = int((accepted - rejected).abs().argmin())
    return float(accepted[place] + rejected[place]) / 2


# -- silero-vad --------------------------------------------------------------------------------------------------------


class SpeechDetector(nn.Module):
    """Of clips [batch, frames, 64 + 512 samples], the probability that each frame is speech [batch, frames]."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, 128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, 1, 1)
        self.conv2 = nn.Conv1d(128, 64, 3, 2, 1)
        self.conv3 = nn.Conv1d(64, 64, 3, 2, 1)
        self.conv4 = nn.Conv1d(64, 128, 3, 1, 1)
        self.lstm = nn.LSTM(128, 128, batch_first=True)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, frames: Tensor) -> Tensor:
        batch, count = frames.shape[:2]
        x = F.pad(frames.flatten(0, 1)[:, None], (0, 64), mode="reflect")
        x = self.stft_conv(x)
        x = (x[:, :129] ** 2 + x[:, 129:] ** 2).sqrt()
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = F.relu(self.conv4(F.relu(self.conv3(x))))
        x, _ = self.lstm(x.squeeze(-1).view(batch, count, -1))
        return self.final_conv(F.relu(x).transpose(1, 2)).sigmoid().squeeze(1)


def _archive() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        file = folder_of("silero_vad", "pip install --no-deps silero-vad") / "data" / "silero_vad.jit"
        return torch.jit.load(str(file), map_location="cpu")


def _detector() -> SpeechDetector:
    names = {"stft.forward_basis_buffer": "stft_conv.weight"}
    for kind in ("weight", "bias"):
        names |= {f"encoder.{k}.reparam_conv.{kind}": f"conv{k + 1}.{kind}" for k in range(4)}
        names |= {f"decoder.rnn.{kind}_{gate}": f"lstm.{kind}_{gate}_l0" for gate in ("ih", "hh")}
        names[f"decoder.decoder.2.{kind}"] = f"final_conv.{kind}"
    stored, model = _archive()._model.state_dict(), SpeechDetector()
    model.load_state_dict({own: stored[theirs] for theirs, own in names.items()})
    return model.eval()


def silero(quick: bool) -> Network:
    model = _detector()
    parts = [_clips(speakers, seed) for seed, speakers in enumerate(_spoken(quick))]

    def detection(module: nn.Module, part: int) -> Scores:
        module.eval()
        frames, speech = parts[part]
        with torch.no_grad():
            found = torch.cat([module(x) for x in frames.split(8)])
        right = float(((found > THRESHOLD) == speech).double().mean())
        return {"frames right": right, "ROC area": _roc_area(found.flatten(), speech.flatten())}

    batches = [(x,) for x in parts[0][0].split(8)]
    example = (parts[0][0][:1],)
    return Network(model, example, batches, lambda m: detection(m, 1), lambda m: detection(m, 2), [model.final_conv])


def _clips(speakers: Sequence[Sequence[np.ndarray]], seed: int) -> tuple[Tensor, Tensor]:
    """Clips of 4 s as frames [clips, 125, 576], and whether there is speech in each frame [clips, 125]."""
    rng = np.random.default_rng(seed)
    clean: list[np.ndarray] = []
    for wav in (wav for utterances in speakers for wav in utterances):
        power = max(float(np.mean(wav**2)), 1e-9)
        clean += [np.zeros(int(rng.uniform(0.5, 2.5) * RATE), np.float32), wav / power**0.5]
    sound = np.concatenate(clean)
    samples = FRAME * FRAMES
    sound = sound[: len(sound) // samples * samples].reshape(-1, samples)
    speech = (sound.reshape(len(sound), FRAMES, FRAME) ** 2).mean(2) > QUIET
    noisy = np.stack([clip + _noise(rng) * 10 ** (-rng.uniform(0, 20) / 20) for clip in sound]) * 0.05
    before = np.pad(noisy, ((0, 0), (CONTEXT, 0)))[:, :samples].reshape(len(sound), FRAMES, FRAME)[:, :, :CONTEXT]
    frames = np.concatenate((before, noisy.reshape(len(sound), FRAMES, FRAME)), 2)
    return torch.from_numpy(frames).float(), torch.from_numpy(speech)


def _noise(rng: np.random.Generator) -> np.ndarray:
    """Of mean square 1: white, brown, or a hum with clicks."""
    samples, kind = FRAME * FRAMES, rng.integers(3)
    sound = rng.standard_normal(samples)
    if kind == 1:
        sound = np.cumsum(sound)
        sound -= np.convolve(sound, np.ones(400) / 400, "same")
    elif kind == 2:
        hum = np.sin(2 * np.pi * rng.uniform(50, 200) * np.arange(samples) / RATE)
        sound = hum + 0.1 * sound + 8 * (rng.random(samples) < 4 / RATE)
    return (sound / np.sqrt(np.mean(sound**2))).astype(np.float32)


def _roc_area(found: Tensor, wanted: Tensor) -> float:
    ranks = torch.empty(len(found), dtype=torch.double)
    ranks[found.argsort()] = torch.arange(1, len(found) + 1, dtype=torch.double)
    positive = int(wanted.sum())
    return float((ranks[wanted].sum() - positive * (positive + 1) / 2) / (positive * (len(found) - positive)))


def main() -> None:
    """Both networks beside the packages' own."""
    torch.set_num_threads(1)
    encoder = _voice_encoder()
    with torch.no_grad():
        mels = _partials(encoder, _spoken(True)[0])[0][:8]
        difference = (encoder(mels) - SpeakerEncoder(encoder).eval()(mels)).abs().max()
        print(f"resemblyzer: largest difference of embeddings {difference:.1e}")
        archive = _archive()
        archive.reset_states()
        frames = _clips(_spoken(True)[0], 0)[0][:1]
        theirs = torch.stack([archive(frame[None, CONTEXT:], RATE).squeeze() for frame in frames[0]])
        print(f"silero-vad: largest difference of probabilities {(theirs - _detector()(frames)[0]).abs().max():.1e}")


if __name__ == "__main__":
    main()

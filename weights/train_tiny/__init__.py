"""The recipe of the embedded model, one command per stage; a stopped stage goes on where its checkpoint stands.

    pip install -e '.[train]'
    for stage in data classifier vae text diffusion export; do
        python -m ledits_min.weights.train_tiny $stage --out ~/tiny-run
    done
    python -m bench.study.evaluate --out ~/tiny-run

data        draw the portraits (portraits.py): avataaars faces with known attributes
classifier  the attribute oracle that scores edits; the model itself never meets it
vae         64 x 64 pictures <-> 4 x 16 x 16 latents, whitened before they are used
text        the text encoder learns to read captions before the diffusion starts: without that, prompts collapse
diffusion   the UNet learns to predict noise under captions
export      write weights/tiny: a diffusers folder in fp16, sample portraits, train_log.json

bench.study.evaluate measures autoencoder, oracle and generation on unseen portraits, bench.study the edits.
"""

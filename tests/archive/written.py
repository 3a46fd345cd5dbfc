"""What other programs write into their pictures, whole, as their sources and published examples have it.

A1111's by `create_infotext` of modules/processing.py as of each version, ComfyUI's by the graphs of its examples,
InvokeAI's by invocations/metadata.py, stable-diffusion.cpp's by examples/common, mflux's by its image metadata.
"""

from __future__ import annotations

from typing import Any

A1111 = {
    "1.5": """a lighthouse on a cliff, <lora:add_detail:0.6>
Negative prompt: easynegative, lowres
Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, Model hash: 6ce0161689, \
Model: v1-5-pruned-emaonly, VAE hash: 735e4c3a44, VAE: vae-ft-mse-840000-ema-pruned.safetensors, \
Denoising strength: 0.45, Clip skip: 2, ENSD: 31337, Hires upscale: 1.5, Hires steps: 15, \
Hires upscaler: 4x-UltraSharp, Lora hashes: "add_detail: 7c6bad76eb54", TI hashes: "easynegative: c74b4e810b03", \
Version: v1.5.2""",
    "1.6": """a lighthouse on a cliff
Negative prompt: lowres
Steps: 30, Sampler: DPM++ 2M SDE Karras, CFG scale: 6.5, Seed: 3101814372, Size: 1024x1024, Model hash: 31e35c80fc, \
Model: sd_xl_base_1.0, VAE hash: 63aeecb90f, VAE: sdxl_vae.safetensors, RNG: CPU, \
Refiner: sd_xl_refiner_1.0 [7440042bbd], Refiner switch at: 0.8, Version: v1.6.0""",
    "1.7": """a lighthouse on a cliff
Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model hash: 6ce0161689, \
Model: v1-5-pruned-emaonly, Token merging ratio: 0.4, NGMS: 1, Eta: 0.67, Downcast alphas_cumprod: True, \
Hashes: {"vae": "735e4c3a44", "model": "6ce0161689"}, Version: v1.7.0""",
    "1.8": """a lighthouse on a cliff
Steps: 20, Sampler: DPM++ 3M SDE Exponential, CFG scale: 7, Seed: 1, Size: 512x512, Model hash: 6ce0161689, \
Model: v1-5-pruned-emaonly, Denoising strength: 0.7, RNG: CPU, Mask blur: 4, Inpaint area: Only masked, \
Masked area padding: 32, Version: v1.8.0""",
    "1.9": """a lighthouse on a cliff
BREAK
on a rock
Negative prompt: lowres,
blurry
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x512, Model hash: 6ce0161689, \
Model: v1-5-pruned-emaonly, RNG: CPU, ControlNet 0: "Module: canny, Model: control_canny [d14c016b], Weight: 0.8", \
Version: v1.9.4""",
    "1.10": """a lighthouse on a cliff
Steps: 20, Sampler: Euler, Schedule type: SGM Uniform, CFG scale: 7, Seed: 1, Size: 512x512, Model hash: 6ce0161689, \
Model: v1-5-pruned-emaonly, Denoising strength: 0.5, RNG: CPU, Emphasis: No norm, Hires CFG Scale: 5, \
Hires upscale: 2, Hires upscaler: Latent, Hires schedule type: Karras, Version: v1.10.1""",
}

_LOADERS: dict[str, Any] = {
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5-pruned-emaonly.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"batch_size": 1, "height": 768, "width": 512}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": "a glass bottle"}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": "bad hands"}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
}
_SAMPLER = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
_USUAL = {"cfg": 8, "steps": 20, "sampler_name": "euler", "scheduler": "normal"}
_LORA = {"lora_name": "detail.safetensors", "strength_model": 0.8, "strength_clip": 1.0}
_ADVANCED = {"add_noise": "enable", "start_at_step": 0, "end_at_step": 20, "return_with_leftover_noise": "enable"}
_REFINED = {"add_noise": "disable", "start_at_step": 20, "end_at_step": 10000, "return_with_leftover_noise": "disable"}

COMFY: dict[str, dict[str, Any]] = {
    "default": _LOADERS
    | {"3": {"class_type": "KSampler", "inputs": {"seed": 8566257, "denoise": 1, **_USUAL, **_SAMPLER}}},
    "lora": _LOADERS
    | {
        "3": {"class_type": "KSampler", "inputs": {"seed": 7, "denoise": 1, **_USUAL, **_SAMPLER, "model": ["10", 0]}},
        "10": {"class_type": "LoraLoader", "inputs": {**_LORA, "model": ["4", 0], "clip": ["4", 1]}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["10", 1], "text": "a glass bottle"}},
    },
    # Of SDXL's example: the base model's sampler adds the noise, the refiner's goes on from there.
    "base and refiner": _LOADERS
    | {
        "2": {
            "class_type": "KSamplerAdvanced",
            "inputs": {"noise_seed": 721897303308196, **_USUAL, **_SAMPLER, **_ADVANCED},
        },
        "3": {
            "class_type": "KSamplerAdvanced",
            "inputs": {
                "noise_seed": 0,
                **_USUAL,
                **_REFINED,
                "latent_image": ["2", 0],
                "model": ["12", 0],
                "positive": ["15", 0],
                "negative": ["16", 0],
            },
        },
        "12": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd_xl_refiner_1.0.safetensors"}},
        "15": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["12", 1], "text": "refined"}},
        "16": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["12", 1], "text": "unrefined"}},
    },
}

_INVOKE = {
    "generation_mode": "txt2img", "positive_prompt": "a fox", "negative_prompt": "blurry", "width": 512, "height": 768,
    "seed": 42, "rand_device": "cpu", "cfg_scale": 7.5, "cfg_rescale_multiplier": 0, "steps": 30,
}  # fmt: skip
_MODEL_4 = {"key": "8e0b", "hash": "blake3:fe58", "name": "Dreamshaper 8", "base": "sd-1", "type": "main"}
INVOKE: dict[str, dict[str, Any]] = {
    "3": _INVOKE
    | {
        "app_version": "3.5.0", "scheduler": "dpmpp_2m_k", "clip_skip": 0, "controlnets": [], "ipAdapters": [],
        "model": {"model_name": "dreamshaper", "base_model": "sd-1", "model_type": "main"}, "t2iAdapters": [],
        "loras": [{"lora": {"model_name": "detail", "base_model": "sd-1"}, "weight": 0.8}], "strength": None,
        "vae": {"model_name": "sd-vae-ft-mse", "base_model": "sd-1"}, "init_image": None,
        "positive_style_prompt": None, "negative_style_prompt": None,
    },
    "4": _INVOKE
    | {
        "app_version": "4.2.9", "scheduler": "euler", "seamless_x": False, "seamless_y": False, "model": _MODEL_4,
        "strength": 0.75, "positive_style_prompt": "", "negative_style_prompt": "", "hrf_enabled": False,
        "hrf_method": "ESRGAN", "hrf_strength": 0.45,
    },
    "5": _INVOKE
    | {
        "app_version": "5.6.0", "scheduler": "dpmpp_3m_k", "seamless_x": False, "seamless_y": False, "model": _MODEL_4,
        "loras": [], "regions": [], "canvas_v2_metadata": {"inpaintMasks": []}, "ref_images": [],
    },
}  # fmt: skip

SDCPP_OLD = """a lighthouse
Negative prompt: blurry
Steps: 20, CFG scale: 7.000000, Guidance: 3.500000, Eta: 0.000000, Seed: 42, Size: 512x512, Model: sd-v1-4.ckpt, \
RNG: std_default, Sampler: euler_a, Version: stable-diffusion.cpp"""
SDCPP_TEXT = """a lighthouse, Seed: 9
Negative prompt: blurry
Steps: 28, CFG scale: 5.00, Guidance: 3.50, Seed: 16124, Size: 512x768, Model: v1-5-pruned-emaonly.safetensors, \
RNG: cuda, Sampler: dpm++2m karras, Version: stable-diffusion.cpp"""
SDCPP = {
    "schema": "sdcpp.image.params/v1", "mode": "img_gen", "seed": 16124, "width": 512, "height": 768, "clip_skip": -1,
    "generator": {"name": "stable-diffusion.cpp", "version": "master", "commit": "b290693"}, "strength": 0.75,
    "control_strength": 0.9, "ip_adapter_strength": 0.6, "auto_resize_ref_image": True, "increase_ref_index": False,
    "prompt": {"positive": "a lighthouse, Seed: 9", "negative": "blurry"}, "rng": "cuda",
    "sampling": {
        "steps": 28, "eta": 0.0, "flow_shift": 0.0, "method": "dpm++2m", "scheduler": "karras", "custom_sigmas": [],
        "guidance": {
            "txt_cfg": 5.0, "img_cfg": 5.0, "distilled_guidance": 3.5,
            "slg": {"scale": 0.0, "layers": [7, 8, 9], "start": 0.01, "end": 0.2},
        },
    },
    "models": {"model": "v1-5-pruned-emaonly.safetensors", "vae": "vae.safetensors"},
    "loras": [{"name": "detail", "multiplier": 0.8}],
    "hires": {"enabled": False, "upscaler": "Latent", "scale": 2.0, "steps": 0, "denoising_strength": 0.7},
}  # fmt: skip

MFLUX = {
    "mflux_version": "0.9.6", "model": "dev", "base_model": "None", "seed": 42, "steps": 20, "guidance": 3.5,
    "precision": "mlx.core.bfloat16", "quantize": 8, "generation_time_seconds": 90.1, "lora_paths": None,
    "lora_scales": None, "image_path": None, "image_strength": None, "controlnet_image_path": None,
    "controlnet_strength": None, "masked_image_path": None, "depth_image_path": None, "redux_image_paths": None,
    "redux_image_strengths": None, "prompt": "a fox", "negative_prompt": None, "width": 1024, "height": 576,
    "created_at": "2025-07-01T10:00:00",
}  # fmt: skip

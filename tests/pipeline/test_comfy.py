"""A graph of ComfyUI is followed from the picture to what drew it."""

from __future__ import annotations

import time
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sdcli.pipeline.comfy import nodes_besides, read_graph

USUAL: dict[str, Any] = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 156680208700286,
            "steps": 20,
            "cfg": 8,
            "sampler_name": "dpmpp_2m",
            "scheduler": "karras",
            "denoise": 1,
            "model": ["10", 0],
            "positive": ["6", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a glass bottle", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "text, watermark", "clip": ["4", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
    "10": {"class_type": "LoraLoader", "inputs": {"lora_name": "x", "strength_model": 1.0, "model": ["4", 0]}},
}
FACTS = {
    "prompt": "a glass bottle",
    "negative": "text, watermark",
    "seed": 156680208700286,
    "steps": 20,
    "sampler": "dpmpp_2m",
    "schedule": "karras",
    "guidance": 8,
    "width": 512,
    "height": 768,
    "model": "v1-5.safetensors",
    "strength": 1,
}


def changed(**inputs: Any) -> dict[str, Any]:
    """The usual graph with inputs of the sampler changed."""
    sampler = USUAL["3"]
    return USUAL | {"3": {**sampler, "inputs": sampler["inputs"] | inputs}}


def test_the_usual_graph_is_read_whole() -> None:
    assert read_graph(USUAL) == FACTS


def test_links_are_followed_through_nodes_between_and_each_conditioning_keeps_to_its_own() -> None:
    control = {"class_type": "ControlNetApplyAdvanced", "inputs": {"negative": ["7", 0], "positive": ["6", 0]}}
    graph = changed(positive=["20", 0], negative=["20", 1]) | {"20": control}
    assert read_graph(graph) == FACTS


def test_a_conditioning_that_is_zeroed_out_has_no_text() -> None:
    zeroed = {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["6", 0]}}
    assert read_graph(changed(negative=["20", 0]) | {"20": zeroed}) == FACTS | {"negative": ""}
    between = {"class_type": "ConditioningSetTimestepRange", "inputs": {"conditioning": ["20", 0]}}
    assert read_graph(changed(negative=["21", 0]) | {"20": zeroed, "21": between}) == FACTS | {"negative": ""}
    both = {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["20", 0], "conditioning_2": ["7", 0]}}
    assert read_graph(changed(negative=["22", 0]) | {"20": zeroed, "22": both}) == FACTS


def test_the_model_of_an_upscaler_or_a_control_net_is_not_the_one_that_drew() -> None:
    """Their loaders have a `model_name`, too, and are nearer than the checkpoint behind two LoRAs."""
    graph = changed(latent_image=["20", 0], model=["23", 0]) | {
        "20": {"class_type": "VAEEncode", "inputs": {"pixels": ["21", 0]}},
        "21": {"class_type": "ImageUpscaleWithModel", "inputs": {"upscale_model": ["22", 0]}},
        "22": {"class_type": "UpscaleModelLoader", "inputs": {"model_name": "4x.pth"}},
        "23": {"class_type": "LoraLoader", "inputs": {"lora_name": "y", "model": ["10", 0]}},
        "10": {"class_type": "LoraLoader", "inputs": {"lora_name": "x", "model": ["24", 0]}},
        "24": {"class_type": "LoraLoader", "inputs": {"lora_name": "z", "model": ["4", 0]}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a glass bottle", "clip": ["23", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "text, watermark", "clip": ["23", 1]}},
    }
    assert read_graph(graph)["model"] == "v1-5.safetensors"
    assert "model" not in read_graph(graph | {"4": {"class_type": "Unknown", "inputs": {}}})


def test_a_model_is_found_through_a_guider() -> None:
    graph = {
        "1": {"class_type": "SamplerCustomAdvanced", "inputs": {"guider": ["2", 0]}},
        "2": {"class_type": "BasicGuider", "inputs": {"model": ["3", 0]}},
        "3": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux.safetensors"}},
    }
    assert read_graph(graph) == {"model": "flux.safetensors"}


def test_a_seed_or_a_text_from_a_node_of_its_own_is_found() -> None:
    graph = changed(seed=["21", 0]) | {
        "21": {"class_type": "Seed", "inputs": {"seed": 42}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["22", 0], "clip": ["4", 1]}},
        "22": {"class_type": "PrimitiveString", "inputs": {"value": "from elsewhere"}},
    }
    assert read_graph(graph) == FACTS | {"seed": 42, "prompt": "from elsewhere"}


def test_layers_of_clip_that_are_left_out_count_from_the_last() -> None:
    for told, skipped in ((-1, 0), (-2, 1)):
        layer = {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": told, "clip": ["4", 1]}}
        text = {"class_type": "CLIPTextEncode", "inputs": {"text": "a glass bottle", "clip": ["20", 0]}}
        assert read_graph(USUAL | {"6": text, "20": layer}) == FACTS | {"clip_skip": skipped}


def test_nodes_that_no_fact_tells_of_are_named_with_their_first_text() -> None:
    assert nodes_besides(USUAL) == {"LoraLoader": "x"}
    second = {"class_type": "KSampler", "inputs": {}}
    image = {"class_type": "LoadImage", "inputs": {"upload": 1, "image": "photo.png"}}
    odd = {"class_type": "Odd", "inputs": [1]}
    found = nodes_besides({"1": second, "2": second, "3": image, "4": odd, "5": "x"})
    assert found == {"LoadImage": "photo.png", "Odd": "", "samplers": 2}


def test_of_two_samplers_the_one_that_is_shown_counts() -> None:
    second = {"class_type": "KSampler", "inputs": USUAL["3"]["inputs"] | {"seed": 7, "latent_image": ["3", 0]}}
    graph = USUAL | {"30": second, "8": {"class_type": "VAEDecode", "inputs": {"samples": ["30", 0]}}}
    assert read_graph(graph) == FACTS | {"seed": 7}


def test_of_a_refiner_and_what_it_goes_on_from_the_latter_counts() -> None:
    inputs = USUAL["3"]["inputs"] | {"seed": 0, "latent_image": ["3", 0], "model": ["31", 0], "add_noise": "disable"}
    graph = USUAL | {
        "30": {"class_type": "KSamplerAdvanced", "inputs": inputs},
        "31": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "refiner.safetensors"}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["30", 0], "vae": ["31", 2]}},
    }
    assert read_graph(graph) == FACTS
    assert read_graph(changed(add_noise="disable")) == FACTS


def test_a_custom_sampler_with_a_guider_is_read() -> None:
    graph = {
        "1": {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {name: [name, 0] for name in ("noise", "guider", "sampler", "sigmas", "latent_image")},
        },
        "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": 5}},
        "guider": {"class_type": "CFGGuider", "inputs": {"cfg": 3.5, "positive": ["p", 0], "negative": ["n", 0]}},
        "sampler": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "sigmas": {"class_type": "BasicScheduler", "inputs": {"scheduler": "simple", "steps": 4, "denoise": 1.0}},
        "latent_image": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 32}},
        "p": {"class_type": "CLIPTextEncode", "inputs": {"text": "yes"}},
        "n": {"class_type": "CLIPTextEncode", "inputs": {"text": "no"}},
    }
    assert read_graph(graph) == {
        "prompt": "yes",
        "negative": "no",
        "seed": 5,
        "steps": 4,
        "sampler": "euler",
        "schedule": "simple",
        "guidance": 3.5,
        "width": 64,
        "height": 32,
        "strength": 1.0,
    }


def test_a_circle_of_links_ends() -> None:
    graph = changed(positive=["40", 0], latent_image=["3", 0], seed=["3", 0])
    graph["40"] = {"class_type": "Reroute", "inputs": {"a": ["41", 0]}}
    graph["41"] = {"class_type": "Reroute", "inputs": {"a": ["40", 0], "b": ["41", 0]}}
    found = read_graph(graph)
    assert "prompt" not in found
    assert found["negative"] == "text, watermark"


def test_a_long_chain_and_a_large_graph_are_no_trouble() -> None:
    chain = {str(i): {"class_type": "Reroute", "inputs": {"x": [str(i + 1), 0]}} for i in range(100, 5000)}
    chain["5000"] = {"class_type": "CLIPTextEncode", "inputs": {"text": "far away"}}
    assert read_graph(changed(positive=["100", 0]) | chain)["prompt"] == "far away"
    assert read_graph({str(i): USUAL["3"] for i in range(10_001)}) == {}


def test_thousands_of_outputs_share_one_walk() -> None:
    """A chain of 3,000 nodes, a picture shown from each, and as many samplers, none of which is above them."""
    chain = {f"r{i}": {"class_type": "Reroute", "inputs": {"x": [f"r{i + 1}", 0]}} for i in range(3000)}
    shown = {f"s{i}": {"class_type": "SaveImage", "inputs": {"images": [f"r{i}", 0]}} for i in range(3000)}
    samplers = {f"k{i}": {"class_type": "KSampler", "inputs": {"seed": i}} for i in range(3000)}
    began = time.process_time()
    assert read_graph(chain | shown | samplers) == {"seed": 0}
    assert read_graph(chain | shown | samplers | {"r3000": {**samplers["k7"]}}) == {"seed": 7}
    assert time.process_time() - began < 2


NAMES = st.sampled_from(["1", "2", "3"])
VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=3) | st.tuples(NAMES, st.just(0)).map(list), st.lists
)
KEYS = st.sampled_from(["positive", "negative", "seed", "text", "steps", "latent_image", "model", "images"])
NODES = st.fixed_dictionaries(
    {
        "class_type": st.sampled_from(["KSampler", "SaveImage", "CLIPTextEncode"]),
        "inputs": st.dictionaries(KEYS, VALUES),
    }
)


@given(st.dictionaries(NAMES, NODES | VALUES))
def test_any_graph_is_read(graph: dict[str, Any]) -> None:
    assert isinstance(read_graph(graph), dict)


def test_a_number_from_a_node_of_many_inputs_is_looked_for_there_once() -> None:
    many = {"class_type": "Numbers", "inputs": {f"text {n}": "x" for n in range(20_000)}}
    chain = {
        str(n): {"class_type": "Model", "inputs": {"steps": ["many", 0], "model": [str(n + 1), 0]}}
        for n in range(5_000)
    }
    sampler = {"class_type": "KSampler", "inputs": {"steps": ["many", 0], "model": ["0", 0]}}
    began = time.process_time()
    assert read_graph({"sampler": sampler, **chain, "many": many}) == {}
    assert time.process_time() - began < 2
